"""Render requests that outlive processes: `records` are the files, `execute` renders one.
`store` and `worker` are the server's."""
