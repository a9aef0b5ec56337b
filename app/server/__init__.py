"""A page and an API over HTTP."""
