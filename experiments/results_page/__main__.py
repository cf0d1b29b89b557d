"""`python -m experiments.results_page`."""

import argparse

from experiments import results_page
from experiments.results_page.documents import documents
from experiments.results_page.section import ROOT

if __name__ == "__main__":
    argparse.ArgumentParser(prog="python -m experiments.results_page", description=results_page.__doc__).parse_args()
    for path, text in documents().items():
        path.write_text(text)
        print(f"wrote {path.relative_to(ROOT)}")
