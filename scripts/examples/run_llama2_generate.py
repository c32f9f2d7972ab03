"""MindFormers' example script as its users write it for a quantized model: only the import lines differ from theirs.

    python scripts/examples/run_llama2_generate.py --config_path DIR/predict_llama2_13b_rtn.yaml
    tandem run --workers 2 scripts/examples/run_llama2_generate.py --config_path DIR/predict_llama2_13b_rtn.yaml --use_parallel

DIR holds the YAML, one .ckpt and tokenizer.model. torchrun and msrun start its ranks as well.
"""

import argparse
import os

import tandem.mindformers as ms
from tandem.mindformers import (
    AutoModel,
    LlamaTokenizer,
    MindFormerConfig,
    Model,
    Tensor,
    build_context,
    build_parallel_config,
    logger,
    transform_and_load_checkpoint,
)
from tandem.mindformers import initializer as init

PROMPTS = ["I love Beijing, because", "LLaMA is a", "Huawei is a company that"]


def main(config_path, network_dir, use_parallel, load_checkpoint):
    config = MindFormerConfig(config_path)
    config.use_parallel = use_parallel
    config.load_checkpoint = load_checkpoint
    num_devices = os.getenv("MS_WORKER_NUM")
    logger.info(f"MS_WORKER_NUM is {num_devices}, which goes over model_parallel of the YAML.")
    config.parallel_config.model_parallel = int(num_devices) if num_devices else 1
    config.parallel_config.data_parallel = 1
    config.parallel_config.pipeline_stage = 1

    build_context(config)
    build_parallel_config(config)

    tokenizer = LlamaTokenizer.from_pretrained(config.trainer.model_name)
    network = AutoModel.from_pretrained(network_dir or os.path.dirname(config_path), download_checkpoint=False)
    model = Model(network)

    model_config = config.model.model_config
    if config.load_checkpoint:
        logger.info("loading the checkpoint")
        shape = (len(PROMPTS), model_config.seq_length)
        input_ids = Tensor(shape=shape, dtype=ms.int32, init=init.One())
        infer_data = network.prepare_inputs_for_predict_layout(input_ids)
        transform_and_load_checkpoint(config, model, network, infer_data, do_predict=True)

    input_ids = tokenizer(PROMPTS, max_length=model_config.seq_length, padding="max_length")["input_ids"]
    outputs = network.generate(
        input_ids,
        max_length=model_config.max_decode_length,
        do_sample=model_config.do_sample,
        top_k=model_config.top_k,
        top_p=model_config.top_p,
    )
    for output in outputs:
        print(tokenizer.decode(output))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--config_path", default="predict_llama2_7b.yaml", type=str)
    parser.add_argument("--network_dir", type=str)
    parser.add_argument("--use_parallel", action="store_true")
    parser.add_argument("--load_checkpoint", type=str)
    args = parser.parse_args()
    main(args.config_path, args.network_dir, args.use_parallel, args.load_checkpoint)
