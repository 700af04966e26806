"""Serving: pages become fields with evidence, questions become answers, over HTTP.

`interface` says what an engine is asked and what it gives. `uploads` makes pictures of pages of what is sent: PNG, JPEG,
TIFF, WebP, PDF and DICOM, within limits that are checked before anything is decoded.
"""
