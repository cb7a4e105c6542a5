"""Train a language model with a memory: `accelerate launch train.py model=gpt2_ltm data=wikitext103`."""

from infformer.commands import run_train

if __name__ == "__main__":
    run_train()
