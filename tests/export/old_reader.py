"""Read exported folders with the transformers and PEFT of this Python; test_compatibility.py runs it with old ones.

Each argument is a folder. `old.safetensors` and `old.json` are written into it: the logits of a few tokens; and, if it
has a tokenizer, the ids of a text, a rendered chat, and the tokens that end a generation.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

TOKENS = list(range(5, 37))
TEXT = "t5 <s> t6 t95"


def load(folder):
    """Load a model, or an adapter on its base, as users do."""
    if (folder / "adapter_config.json").is_file():
        import peft

        return peft.AutoPeftModelForCausalLM.from_pretrained(folder)
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    task = "SequenceClassification" if architecture.endswith("Classification") else "CausalLM"
    return getattr(transformers, f"AutoModelFor{task}").from_pretrained(folder, attn_implementation="eager")


def main(folders):
    """Read each folder, and write what was found into it."""
    for folder in map(Path, folders):
        model = load(folder).eval()
        with torch.no_grad():
            save_file({"logits": model(input_ids=torch.tensor([TOKENS])).logits.float()}, folder / "old.safetensors")
        found = {"transformers": transformers.__version__}
        if (folder / "tokenizer.json").is_file():
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
            encoded = tokenizer(TEXT)
            found["keys"], found["ids"] = sorted(encoded), encoded["input_ids"]
            found["chat"] = tokenizer.apply_chat_template([{"role": "user", "content": "t5"}], tokenize=False)
            found["ends"] = [tokenizer.eos_token, model.generation_config.eos_token_id]
            inputs = tokenizer(TEXT, return_tensors="pt")
            found["text"] = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0].tolist()
        (folder / "old.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
