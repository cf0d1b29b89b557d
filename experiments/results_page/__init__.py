"""Writes docs/results.md and the marked blocks of README.md from the committed results: `make results`.

Every measured number in the documents comes from a JSON file in `experiments/results` through this package.
`documents.SECTIONS` says for each section of the page which command measures it and which files hold the result.
tests/test_documents.py fails when a document is out of date.
"""
