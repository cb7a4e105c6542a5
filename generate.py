"""Read a document, then write: `python generate.py checkpoint=FOLDER document=book.txt prompt='And so'`."""

from infformer.commands import run_generate

if __name__ == "__main__":
    run_generate()
