"""CT scans: from files to volumes in a store, to pairs with reports, to scored findings.

`scans` reads NIfTI files and `dicom` series of slices, both into the records of `header`; `metadata_table`
reads their metadata, `hounsfield` finds the scale to HU, `grids` resamples, and `preprocess` puts these
together: one scan becomes one volume; `chest` says whether it looks like a chest. `ingest` does so for a
folder, into a store, whose rows `volumes` describes, and `audit` tells before that what would be refused.
`names` reads patients and scans from file names, `reports` reads texts and labels and splits patients,
`pairs` joins volumes with reports, `impressions` asks a language model for those that reports lack, and
`zero_shot` scores findings from embeddings. `protocols` says which findings are scored under a published
name, `retrieval` scores the search among volumes and reports, and `radchest` reads the scans of RAD-ChestCT.
"""
