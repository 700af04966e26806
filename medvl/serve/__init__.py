"""Serving: pages become fields with evidence, questions become answers, over HTTP.

`interface` says what an engine is asked and what it gives. `engine` answers requests together, from a model with
adapters that `models` opens; `worker` runs it, and other services, in processes of their own. `uploads` makes pages of
files, whatever they hold; `pages` opens, reads and checks them in such processes.

`settings` is the record of a service, `backend` all of its processes, `rooms` those of systems that are no language model.
"""
