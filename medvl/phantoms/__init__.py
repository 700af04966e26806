"""Drawn data to learn from and to test on, of which the truth is known and which shows no patient.

`chests` writes folders of chest CTs with reports, labels and metadata (`chest_case` draws the patient,
`chest_voxels` the volume on a `canvas`, `chest_findings` the lesions in it, `chest_report` the text).
`pictures` and `modalities` write pictures with questions, in the `styles` of eight modalities, and `anatomy`
pictures to be drawn: heads as CT and as MR. `slides` draws
whole slides as patch features, and `slide_questions` writes them with captions and questions. `pages` writes
medical pages with their fields and boxes (`page_records` draws what they say from `medical_words.toml`,
`page_layout` prints it, `page_grid` prints it in cells, `page_damage` scans and photographs it). All are pure
functions of a config and a name, so the order of the random draws must stay.
"""
