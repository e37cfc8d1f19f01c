"""Cosines of sentence embeddings in the bundled model's own text: where a similarity threshold separates repeats.

    python -m benchmarks.tiny_reasoner.similarity --problems 20

Reads dev problems; no eviction takes part.
"""

from __future__ import annotations

import argparse
from itertools import combinations

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from skipkv_vllm import bundled_model
from skipkv_vllm.sentences import build_tables, split_sentences

from .problems import SPLITS, problems

THRESHOLDS = (0.75, 0.8, 0.85, 0.9, 0.95, 0.97, 0.99)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=bundled_model())
    parser.add_argument("--split", default="dev", choices=[name for name in SPLITS if name != "held-out"])
    parser.add_argument("--problems", type=int, default=20)
    args = parser.parse_args()
    if args.problems < 1:
        parser.error(f"--problems {args.problems} is out of range; allowed: at least 1")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tables = build_tables(tokenizer, "default")
    repeats: list[float] = []
    others: list[float] = []
    flagged, total = torch.zeros(len(THRESHOLDS)), 0
    for problem in problems(args.split, args.problems):
        chat = [{"role": "user", "content": problem.question}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        text = tokenizer(problem.completion, add_special_tokens=False).input_ids
        with torch.no_grad():
            hidden = model.model(torch.tensor([prompt + text])).last_hidden_state[0, len(prompt) :]
        spans = [(s.start, s.end) for s in split_sentences(text, tables)]
        unit = torch.nn.functional.normalize(torch.stack([hidden[a:b].mean(0) for a, b in spans]), dim=-1)
        cosine = (unit @ unit.T).triu(1)
        for i, j in combinations(range(len(spans)), 2):
            same = text[slice(*spans[i])] == text[slice(*spans[j])]
            (repeats if same else others).append(float(cosine[i, j]))
        lengths = torch.tensor([b - a for a, b in spans], dtype=torch.float32)
        flagged += torch.stack([lengths[(cosine > t).any(1)].sum() for t in THRESHOLDS])
        total += len(text)
    same, different = torch.tensor(repeats), torch.tensor(others)
    print(f"{args.problems} {args.split} problems, {total / args.problems:.0f} tokens of text each")
    print(f"different sentences: cosine at most {different.max():.3f}; repeats: median {same.median():.3f}")
    print(f"\n{'threshold':>9}{'repeats above':>16}{'others above':>15}{'text flagged':>15}")
    for threshold, tokens in zip(THRESHOLDS, flagged, strict=True):
        shares = [(same > threshold).float().mean(), (different > threshold).float().mean(), tokens / total]
        print(f"{threshold:9.2f}{shares[0]:16.1%}{shares[1]:15.2%}{shares[2]:15.1%}")


if __name__ == "__main__":
    main()
