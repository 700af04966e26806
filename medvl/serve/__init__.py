"""Serving: pages become fields with evidence, questions become answers, over HTTP.

`settings` is the record of a service. `interface` says what an engine is asked and what it gives: `engine` answers
requests together, from a model with adapters that `models` opens, and `remote` asks another server. `worker` runs an
engine, and other services, in processes of their own: `uploads` makes pages of files, whatever they hold, `pages` opens,
reads and checks them, and `rooms` are the systems that are no language model. `backend` is all of these processes, and
`extract` makes fields of a document by them. `fhir` makes a Bundle of FHIR R4 of fields and their evidence.

`api` is the service over a backend, `http` what every request goes through (size, key, id, errors, log), `forms` how
requests are read, `responses` what they and answers look like, `site` what the routes share and `metrics` what is
counted. The routes are in `page_routes`, `chat_routes` (OpenAI's API) and `room_routes`.

`ui` is a page in the browser over that service with the tabs of `ui_tabs`; it asks by `ui_client`, and `ui_html` writes
what it shows. It runs in an environment of its own, and nothing of it loads torch.
"""
