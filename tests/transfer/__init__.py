"""Snapshots of directories in buckets."""
