"""Statistics, tables, figures and the HTML page. Nothing in this package computes attention."""
