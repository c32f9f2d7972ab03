"""Runs a script of tandem.mindformers and writes how many bytes of the checkpoint each rank has read: FOLDER SCRIPT [ARGUMENTS]."""

import runpy
import sys
from pathlib import Path

from tandem import init
from tandem.mindformers import LlamaForCausalLM

folder, script = Path(sys.argv[1]), sys.argv[2]
load = LlamaForCausalLM.load


def load_and_count(network, checkpoint=None):
    load(network, checkpoint)
    with (folder / f"rank_{init().rank}.txt").open("a") as file:
        file.write(f"{network.read_bytes}\n")


LlamaForCausalLM.load = load_and_count
sys.argv = sys.argv[2:]
runpy.run_path(script, run_name="__main__")
