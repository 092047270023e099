"""The same functions as in the lesson, faster. Each has a plain twin at the top level."""
