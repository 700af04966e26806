"""Whole slides as bags of patch features: from files to visual tokens, and from answers to scores and maps.

`formats` and `csv_features` open files of patch features, `features` reads them whole or in chunks, `names`
finds the features of a slide, and `opened` holds the files that were opened. `pack` and `store` keep many
slides in one file; `check` lists every fault before a training. `tokens` compresses slides to visual tokens,
and `heads` pretrains the compressor on slide labels. `reference_files` reads and writes the compressor and
projector of TC-SSA. `questions` and `question_formats` read questions about slides, and `bench` scores the
answers. `relevance` attributes an answer to tokens and patches; `maps` draws it (with `map_canvas`,
`map_colours` and `map_drawing`), and `geojson` exports it for QuPath.
"""
