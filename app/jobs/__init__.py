"""Render requests that outlive processes: `records` are the files, `store` the folder, `worker`
makes the videos."""
