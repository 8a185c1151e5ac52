"""How the pruned model is served, made again, checked and cited."""

from __future__ import annotations

import shlex
from typing import Final

from reap_stream.card.inputs import CardInputs
from reap_stream.card.reproduce import command_text

CHECKSUMS_FILE: Final = "reap/SHA256SUMS"

_PAPER: Final = """@misc{lasby2025reap,
  title = {REAP the Experts: Why Pruning Prevails for One-Shot MoE Compression},
  author = {Lasby, Mike and Lazarevich, Ivan and Sinnadurai, Nish and Lie, Sean and Ioannou, Yani and Thangarasa, Vithursan},
  year = {2025},
  eprint = {2510.13999},
  archivePrefix = {arXiv},
}"""


def serving_section(inputs: CardInputs) -> str:
    """The section: commands in which MODEL is this repository's id or a directory."""
    trusted = inputs.facts["custom_code"]
    flags = " --trust-remote-code" if trusted else ""
    argument = ", trust_remote_code=True" if trusted else ""
    architecture = inputs.facts["architecture"]
    causal = architecture.endswith("ForCausalLM")
    loader = "AutoModelForCausalLM" if causal or trusted else architecture
    return (
        "## Serving\n\n"
        "The architecture is the source's, with fewer experts: what serves the source serves this "
        "too. MODEL is this repository's id or a directory with its files.\n\n"
        f"```sh\nvllm serve MODEL{flags}{_speculation(inputs)}\n```\n\n"
        "```python\n"
        f"from transformers import AutoTokenizer, {loader}\n\n"
        f'tokenizer = AutoTokenizer.from_pretrained("MODEL"{argument})\n'
        f'model = {loader}.from_pretrained("MODEL", dtype="auto", device_map="auto"{argument})\n'
        "```\n\n"
        "These commands were not run on this checkpoint."
    )


def _speculation(inputs: CardInputs) -> str:
    usable = inputs.facts["pruned"]["mtp_layers"] and inputs.settings["mtp"] != "keep"
    if not usable:
        return ""
    return """ \\\n  --speculative-config '{"method": "mtp", "num_speculative_tokens": 1}'"""


def reproduce_section(inputs: CardInputs) -> str:
    """The section."""
    made = inputs.run["versions"]
    packages = ", ".join(f"{name} {made[name]}" for name in ("torch", "transformers", "python"))
    return (
        "## Reproduce\n\n"
        f"With reap-stream {made['reap-stream']} ({packages}); what lay in other directories is "
        f"named without them.\n\n```sh\n{command_text(inputs)}\n```\n\n"
        f"`reap-stream verify {shlex.quote(inputs.name)} --source SOURCE` compares every byte with the source's."
    )


def files_section(inputs: CardInputs) -> str:
    """The section."""
    evaluation = "" if inputs.evaluation is None else "- `reap/eval.json`: the evaluation\n"
    return (
        "## Files\n\n"
        "- `reap/kept_experts.json`: kept experts of every layer, by their number in the source\n"
        "- `reap/scores.safetensors`: statistics of every expert, from which other targets can be "
        "cut without running the model (`reap-stream compact`)\n"
        "- `reap/run.json`: settings, source, calibration data, versions, time and memory\n"
        f"{evaluation}"
        "- `reap/card.json`, `reap/source_card.md`: the figures above and the source's own card, from "
        "which `reap-stream card` renders this page\n"
        f"- `{CHECKSUMS_FILE}`: written before the upload; `sha256sum -c {CHECKSUMS_FILE}` "
        "checks every file but this one"
    )


def citation_section(inputs: CardInputs) -> str:
    """The section."""
    made = f"Made with reap-stream {inputs.run['versions']['reap-stream']}."
    if inputs.settings["method"] == "random":
        return f"## Citation\n\n{made}"
    return f"## Citation\n\n{made}\n\n```bibtex\n{_PAPER}\n```"
