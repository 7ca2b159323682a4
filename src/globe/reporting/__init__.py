"""The report of a sweep: runs as they are on disk, tables, pictures, and the two documents they go into."""
