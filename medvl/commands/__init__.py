"""commands: what the tasks of `tasks.py` call, by subject; they read options, call a system or a package, and
print.

`doctor` (what is installed), `experiments` (list, labels, memory), `questions` (`invoke ask`), `audit` (headers of
CT scans), `preprocess` (scans into a store, features), `split` (tables by patient), `scans` (embed, classify),
`impressions` (those that reports lack), `data` (`invoke data`, `invoke conversations`), `slides` (check, pack),
`vqgan` and `plugins` (convert), `pictures` (`invoke draw`), `registries` (`invoke adapters`: build, add, list,
show), `pipeline` (all steps from a model to a report), `redact` (pages and DICOM files without names), `serve` (the
HTTP service), `ui` (the page to look at it).
"""
