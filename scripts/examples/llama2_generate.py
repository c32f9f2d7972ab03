"""MindFormers' run_llama2_generate.py, line by line in tandem's words, as one rank or several.

    python scripts/examples/llama2_generate.py CHECKPOINT_DIR
    tandem run scripts/examples/llama2_generate.py --workers 2 CHECKPOINT_DIR
    torchrun --nproc-per-node 2 scripts/examples/llama2_generate.py CHECKPOINT_DIR

| MindFormers                                              | here                                           |
|----------------------------------------------------------|------------------------------------------------|
| from mindformers import AutoModel, LlamaTokenizer        | from tandem import AutoModel, LlamaTokenizer   |
| build_context(config), build_parallel_config(config)     | tandem.init(), which from_pretrained calls too |
| model = AutoModel.from_pretrained(dir)                   | the same                                       |
| tokenizer = LlamaTokenizer.from_pretrained(dir)          | the same                                       |
| inputs_ids = tokenizer(prompt, max_length=.., ..)["input_ids"] | the same                                 |
| outputs = model.generate(inputs_ids, max_length=.., ..)  | the same                                       |
| print(tokenizer.decode(output))                          | the same, on rank 0                            |
"""

import sys

import tandem
from tandem import AutoModel, LlamaTokenizer


def main(path: str) -> None:
    """Decode the original's three prompts with the checkpoint in `path`."""
    group = tandem.init()
    model = AutoModel.from_pretrained(path)
    tokenizer = LlamaTokenizer.from_pretrained(path)
    prompts = ["I love Beijing, because", "LLaMA is a", "Huawei is a company that"]
    inputs_ids = tokenizer(prompts, max_length=32, padding="max_length")["input_ids"]
    outputs = model.generate(inputs_ids, max_length=48, do_sample=False, top_k=3, top_p=1.0)
    if group.rank == 0:
        for output in outputs:
            print(tokenizer.decode(output))


if __name__ == "__main__":
    main(sys.argv[1])
