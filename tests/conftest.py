import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "3000")    # see train.py


@pytest.fixture
def serve():
    """serve({path: bytes}) -> (address, the same dict, which may change): a web server on 127.0.0.1.

    A value (bytes, length) announces another length than it sends; a function is given the handler, and does as it likes;
    None or a missing path is a 404.
    """
    servers = []

    def start(files):
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                content = files.get(self.path)
                if content is None:
                    return self.send_error(404)
                if callable(content):
                    return content(self)
                content, length = content if isinstance(content, tuple) else (content, len(content))
                self.send_response(200)
                self.send_header("Content-Length", str(length))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}", files

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()
