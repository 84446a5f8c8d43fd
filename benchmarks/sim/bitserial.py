"""BitMoD's bit-serial elements against f16 units of the same area, on LLaMA-2-7B. Simulated.

    python -m benchmarks sim.bitserial

Cycles and energy by ``barefoot.sim.bitserial``, for one token and for a prompt of 256. The imitation has the same bytes
and one step more for each weight, as integers of 6 bits take: what is gained by formats whose levels have two terms.
"""

from __future__ import annotations

from barefoot.sim.bitserial import DECODE, FLOAT, PREFILL, Array, Cycles, product
from benchmarks.harness import card, claim, save

LAYERS, HIDDEN, WIDE = 32, 4096, 11008
MATRICES = [(HIDDEN, HIDDEN)] * 4 + [(WIDE, HIDDEN)] * 2 + [(HIDDEN, WIDE)]
PAPER = {"speed over ANT and OliVe at equal area, six models": [1.69, 1.48]}
CASES = {"one token": (DECODE, 1, 3.0625), "prompt": (PREFILL, 256, 4.0625)}  # array, tokens, bits a weight


def layers(array: Array, tokens: int, weight_bits: float, n_steps: int = 1) -> list[Cycles]:
    return [product(array, n, k, tokens, weight_bits, n_steps) for n, k in MATRICES] * LAYERS


def summary(cycles: list[Cycles]) -> dict[str, float]:
    return {
        "cycles": sum(each.total for each in cycles),
        "compute cycles": sum(each.compute for each in cycles),
        "millijoules of the elements": round(1e3 * sum(each.joules for each in cycles), 3),
    }


def main() -> None:
    config = {"model": "LLaMA-2-7B, layers", "prompt": 256, "simulated": True}
    card("simulated: a bit-serial accelerator", config)
    results: dict[str, dict[str, dict[str, float]]] = {}
    for case, (array, tokens, bits) in CASES.items():
        results[case] = {
            "f16": summary(layers(FLOAT, tokens, 16)),
            "bitmod": summary(layers(array, tokens, bits, 2)),
            "imitation: three terms": summary(layers(array, tokens, bits, 3)),
        }
        for name, found in results[case].items():
            print(f"  {case} {name}: {found}")

    def ratio(case: str, what: str, name: str = "bitmod") -> float:
        return results[case]["f16"][what] / results[case][name][what]

    ratios = {
        f"{case}, f16 / {name}, {what}": round(ratio(case, what, name), 3)
        for case in CASES
        for name in ("bitmod", "imitation: three terms")
        for what in ("cycles", "compute cycles", "millijoules of the elements")
    }
    bits = 16 / CASES["one token"][2]
    save(
        "sim/bitserial",
        {
            "status": "simulated",
            "config": config,
            "paper": PAPER | {"not modelled": "the peers ANT and OliVe, memory's energy"},
            "results": results,
            "ratios": ratios,
            "claims": [
                claim("one token: cycles against f16, of the ratio of bits", ratio("one token", "cycles") / bits,
                      at_least=0.9, at_most=1.1),
                claim("prompt: compute cycles against f16", ratio("prompt", "compute cycles"),
                      at_least=0.95 * 8 / 3, at_most=1.05 * 8 / 3),
                claim("prompt: the imitation's compute cycles against bitmod's",
                      ratio("prompt", "compute cycles") / ratio("prompt", "compute cycles", "imitation: three terms"),
                      at_least=1.4),
            ],
        },
    )  # fmt: skip


if __name__ == "__main__":
    main()
