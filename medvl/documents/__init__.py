"""Medical pages: what stands on them as records, and how well an answer reads them.

`fields` has the records of a page (patient, diagnoses, medications, labs, vitals, procedures), writes them as
JSON and reads them from a model's answer, JSON by `loose_json` or running text by `prose`; `fields_schema` has their
JSON schema, and reads a user's own. `quantities`
compares numbers, units, flags and terms, and `score` answers with pages.

`words` has the words of a page with their boxes, as lines in reading order and as text for prompts; `read_page`
reads them from an image (OCR). `rules` makes fields of words. `page_search` finds texts among them, `locate` the place
of every value of a record, and `evidence` says which values of an answer the pages show, and which contradict
each other.

`redact` blacks out what tells who a page is about, `redact_dicom` also the header of a DICOM file.

`page_words` puts the words of a conversation's images into its prompt.

`text_page` draws plain texts onto pages. `sources` makes conversations of public data sets: `source_record`
says which, `source_rows` reads their rows.
"""
