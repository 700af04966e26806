"""A number is a result: what was measured, on how many samples, with its interval and where it was made.

`results` holds the record, its file and tables; `metrics` scores findings and retrieval with bootstrap
intervals, `calibration` makes probabilities of scores, `accuracy` right and wrong answers in groups, `pictures` how much pictures resemble their targets;
`answers` says when a written answer is right, `choices` reads and writes multiple-choice questions,
`choice_answers` tells which option an answer chooses, and `vqa` scores answers of both kinds; `plots` draws figures, `report` writes pages and CSV.
"""
