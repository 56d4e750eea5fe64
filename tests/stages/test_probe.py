from tests.stages.conftest import *


def test_probe(stocked, llmctl, home):
    def go(line):
        w = line.split()
        o = llmctl(*w)
        with open("/tmp/probe.txt", "a") as f:
            f.write(f"$ {line[:160]}\n  [{o.code}] out={o.out[:300]!r}\n{o.err}\n")

    T = " ".join(TRAIN)
    go(T + " --out a")
    go(T + " --out b --dry-run --json")
    go("eval base --data data.jsonl --json")
    go("generate base Anna --json --max-new-tokens 5")
    go("pretrain base --data data.jsonl --out c train.max_steps=3 train.threads=1")
    print(sorted(p.name for p in (stocked / "a").iterdir()))
    open("/tmp/probe.txt", "a").write(
        (stocked / "a" / "run.json").read_text() + (stocked / "a" / "recipe.yaml").read_text()
    )
