"""Render requests that outlive processes."""
