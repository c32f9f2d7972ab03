"""tandem.LLM: prompts, a stream, and a conversation.

    python scripts/examples/llm_generate.py CHECKPOINT_DIR [WORKERS]

No launcher, no `if __name__ == "__main__"`: the ranks never import this file.
"""

import sys

from tandem import LLM, SamplingParams

PROMPTS = ["I love Beijing, because", "LLaMA is a", "Huawei is a company that"]
greedy = SamplingParams(max_tokens=16, temperature=0)

with LLM(sys.argv[1], workers=int(sys.argv[2]) if len(sys.argv) > 2 else 2) as llm:
    for out in llm.generate(PROMPTS, greedy):
        print(f"{out.prompt}|{out.outputs[0].text}")
    for token in llm.generate(PROMPTS[0], greedy, stream=True):
        print(token.text, end="", flush=True)
    print()
    (answer,) = llm.chat([{"role": "user", "content": "Tell me a story."}], greedy)
    print(answer.outputs[0].text)
