"""The ground floor, which every package builds on.

`config` reads experiment records, `tree` handles nested dicts of tensors, `files` writes whole files and
reads tables, arrays and HDF5 datasets with checks, `store` keeps arrays with rows of metadata in one HDF5
file, `processes` is what processes that train together need, `workers` is a pool of worker processes,
`progress` runs batches that can be resumed, `display` shows progress bars and keeps the lines of a run,
`text` shortens values for messages.
"""
