"""Serving: pages become fields with evidence, questions become answers, over HTTP.

`interface` says what an engine is asked and what it gives.
"""
