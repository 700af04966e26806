"""The ground floor, which every package builds on.

`config` reads experiment records, `tree` handles nested dicts of tensors, `files` writes whole files and
reads tables, arrays and HDF5 datasets with checks. `rows` are rows of an HDF5 file that several processes
write, `store` a file of arrays of one shape in such rows, `cache` what frozen weights made of inputs.
`processes` is what processes that train together need, `workers` is a pool of worker processes, `cluster` is
one of machines, `progress` runs batches that can be resumed, `transfer` copies batches to a GPU, `display`
shows progress bars and keeps the lines of a run, `text` shortens values for messages, `dicom` is what
readers of DICOM files share.
"""
