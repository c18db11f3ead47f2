"""Numbers that papers print, to stand beside ours: other inputs, other protocols, never one ranking.

Every block is one paper's table for one data set; its numbers compare with each other and with nothing else,
because LQ seeds, colour spaces and metric versions differ from paper to paper and are rarely published.
"""

from collections.abc import Sequence
from typing import Any

from flashvsr.base.cli import UserError

WARNING = "Published, other inputs: these numbers are not comparable with ours, nor with another block's."

# metric: title, higher is better. DOVER's branches are different quantities.
METRICS = {
    "psnr": ("PSNR", True),
    "ssim": ("SSIM", True),
    "lpips": ("LPIPS", False),
    "dists": ("DISTS", False),
    "niqe": ("NIQE", False),
    "musiq": ("MUSIQ", True),
    "clipiqa": ("CLIPIQA", True),
    "dover_technical": ("DOVER, technical ×100", True),
    "dover_fused": ("DOVER, fused", True),
    "ewarp": ("E*warp ×1e-3", False),
}
FLASHVSR = "UAV | STAR | RealViformer | DOVE | SeedVR2-3B | FlashVSR-Full | FlashVSR-Tiny"
SEEDVR2 = "RealViformer | MGLD | UAV | VEnhancer | STAR | SeedVR-7B | SeedVR2-3B | SeedVR2-7B"
DOVE = "RealESRGAN | ResShift | RealBasicVSR | UAV | MGLD | VEnhancer | STAR | DOVE"
BASICVSR = "BasicVSR | IconVSR"

# (paper and table, methods) -> data set -> metric -> values in the methods' order.
PAPERS: dict[tuple[str, str], dict[str, dict[str, str]]] = {
    ("FlashVSR (CVPR 2026), table 1", FLASHVSR): {
        "YouHQ40": {
            "psnr": "23.19 23.19 23.67 24.39 23.05 23.13 23.31",
            "ssim": ".6075 .6388 .6189 .6651 .6248 .6004 .6110",
            "lpips": ".4585 .4705 .4476 .4011 .3876 .3874 .3866",
            "niqe": "4.834 7.275 3.360 4.890 3.751 3.382 3.489",
            "musiq": "43.07 35.05 62.73 61.60 62.31 69.16 66.63",
            "clipiqa": ".3380 .2974 .4451 .4437 .4909 .5873 .5221",
            "dover_technical": "6.889 7.363 9.739 11.29 12.43 12.71 12.66",
        },
        "REDS30": {
            "psnr": "24.84 24.01 25.96 25.60 24.83 23.92 24.11",
            "ssim": ".6437 .6765 .7092 .7257 .7042 .6491 .6511",
            "lpips": ".4168 .371 .2997 .3077 .3124 .3439 .3432",
            "niqe": "3.104 4.776 2.722 3.564 3.066 2.425 2.680",
            "musiq": "53.00 46.25 63.23 65.51 61.83 68.97 67.43",
            "clipiqa": ".2998 .2807 .3583 .4160 .3695 .4661 .4215",
            "dover_technical": "6.366 6.309 8.338 9.368 8.725 8.734 8.665",
        },
        "SPMCS": {
            "psnr": "23.95 23.68 25.61 25.46 23.62 23.84 24.02",
            "ssim": ".6209 .6700 .7030 .7201 .6632 .6346 .6450",
            "lpips": ".4277 .3910 .3437 .3289 .3417 .3436 .3451",
            "niqe": "3.818 7.049 3.369 4.168 3.425 3.151 3.302",
            "musiq": "54.33 45.03 65.32 69.08 66.87 71.05 69.77",
            "clipiqa": ".4060 .3779 .4150 .5125 .5307 .5792 .5238",
            "dover_technical": "5.850 4.589 8.083 9.525 8.856 9.456 9.426",
        },
        "VideoLQ": {
            "niqe": "4.889 5.534 3.428 5.292 5.205 3.803 4.070",
            "musiq": "44.19 40.19 57.60 45.05 43.39 55.48 52.27",
            "clipiqa": ".2491 .2786 .3183 .2906 .2593 .4184 .3601",
            "dover_technical": "5.912 5.889 6.591 6.786 6.040 8.149 7.481",
        },
    },
    ("SeedVR2, table 1", SEEDVR2): {
        "SPMCS": {
            "psnr": "24.19 23.41 21.69 18.20 22.58 20.78 22.97 22.90",
            "ssim": ".663 .633 .519 .507 .609 .575 .646 .638",
            "lpips": ".378 .369 .508 .455 .420 .395 .306 .322",
            "dists": ".186 .166 .229 .194 .229 .166 .131 .134",
        },
        "UDM10": {
            "psnr": "26.70 26.11 24.62 21.48 24.66 24.29 25.61 26.26",
            "ssim": ".796 .772 .712 .691 .747 .731 .784 .798",
            "lpips": ".285 .273 .323 .349 .359 .264 .218 .203",
            "dists": ".166 .144 .178 .175 .195 .124 .106 .101",
        },
        "REDS30": {
            "psnr": "23.34 22.74 21.44 19.83 22.04 21.74 21.90 22.27",
            "ssim": ".615 .578 .514 .545 .593 .596 .598 .606",
            "lpips": ".328 .271 .397 .508 .487 .340 .350 .337",
        },
        "YouHQ40": {
            "psnr": "23.26 22.62 21.32 18.68 22.15 20.60 22.10 22.46",
            "ssim": ".606 .576 .503 .509 .575 .546 .595 .600",
            "lpips": ".362 .356 .404 .449 .451 .323 .284 .274",
        },
        "VideoLQ": {
            "niqe": "4.153 3.864 4.079 5.122 5.915 4.933 4.687 4.948",
            "musiq": "54.65 53.49 52.90 42.66 40.50 48.35 51.09 45.76",
            "clipiqa": ".411 .333 .386 .269 .243 .258 .295 .257",
            "dover_technical": "7.035 8.109 6.975 7.985 6.891 7.416 8.176 7.236",
        },
    },
    ("DOVE, table 2", DOVE): {
        "UDM10": {
            "psnr": "24.04 23.65 24.13 21.72 24.23 21.32 23.47 26.48",
            "ssim": ".7107 .6016 .6801 .5913 .6957 .6811 .6804 .7827",
            "lpips": ".3877 .5537 .3908 .4116 .3272 .4344 .4242 .2696",
            "dists": ".2184 .2898 .2067 .2230 .1677 .2310 .2156 .1492",
            "clipiqa": ".4189 .4344 .3494 .4697 .4557 .2852 .2417 .5107",
            "dover_fused": ".7060 .3290 .7564 .7291 .7264 .4576 .4830 .7809",
            "ewarp": "4.83 6.12 3.10 3.97 3.59 1.03 2.08 1.77",
        },
        "SPMCS": {
            "psnr": "21.22 21.68 22.17 18.81 22.39 18.58 21.24 23.11",
            "lpips": ".3721 .4467 .3662 .4468 .3263 .5358 .5257 .2888",
            "dover_fused": ".7490 .4930 .6753 .7171 .6754 .4284 .3204 .7828",
            "ewarp": "5.61 8.07 1.88 4.22 1.68 1.19 1.01 1.04",
        },
        "YouHQ40": {
            "psnr": "22.82 23.32 22.39 19.62 23.17 19.78 22.64 24.30",
            "ssim": ".6337 .6273 .5895 .4824 .6194 .5911 .6323 .6740",
            "lpips": ".3571 .4211 .4091 .4268 .3608 .4742 .4600 .2997",
            "dover_fused": ".8572 .6855 .8596 .8596 .8446 .6957 .5594 .8574",
        },
        "RealVSR": {
            "psnr": "20.85 20.81 22.12 20.29 22.02 15.75 17.43 22.32",
            "lpips": ".2016 .2312 .1870 .2671 .2182 .3784 .2943 .1851",
        },
        "MVSR4x": {
            "psnr": "22.47 21.58 21.80 20.42 22.77 20.50 22.42 22.42",
            "lpips": ".4534 .5945 .4235 .4717 .3568 .4471 .4311 .3476",
        },
        "VideoLQ": {
            "clipiqa": ".3617 .4049 .3433 .4132 .3465 .3031 .2652 .3484",
            "dover_fused": ".7310 .6160 .7388 .7370 .7421 .6912 .7080 .7435",
            "ewarp": "7.58 7.79 5.97 13.47 6.79 6.495 5.96 5.85",
        },
    },
    ("BasicVSR and IconVSR, bicubic x4, RGB", BASICVSR): {
        "REDS4": {"psnr": "31.4170 31.6926", "ssim": ".8909 .8951"},
    },
}
NAMES = sorted({dataset for tables in PAPERS.values() for dataset in tables})


def published(dataset: str) -> list[dict[str, Any]]:
    """What papers print for a data set, a block per paper: {title, warning, source, metrics: [{key, title,
    higher, digits}], rows: [{method, values: {key: number}}]}. UserError for a set that no table here has."""
    blocks = []
    for (source, methods), tables in PAPERS.items():
        if dataset not in tables:
            continue
        names = methods.split(" | ")
        texts = {key: text.split() for key, text in tables[dataset].items()}
        rows = [
            {"method": name, "values": {key: float(column[i]) for key, column in texts.items()}}
            for i, name in enumerate(names)
        ]
        metrics = [
            {"key": key, "title": METRICS[key][0], "higher": METRICS[key][1], "digits": decimals(column)}
            for key, column in texts.items()
        ]
        title = f"{dataset} as published: {source}"
        blocks.append(
            {"title": title, "warning": WARNING, "source": source, "metrics": metrics, "rows": rows}
        )
    if not blocks:
        raise UserError(f"no published numbers of {dataset!r} here; there are {', '.join(NAMES)}")
    return blocks


def decimals(texts: Sequence[str]) -> int:
    """As many as the paper prints."""
    return max(len(text.partition(".")[2]) for text in texts)


def published_table(
    block: dict[str, Any],
) -> tuple[list[str], list[tuple[str, list[tuple[str, int | None]]]]]:
    """Headings and rows as `eval.results.table` gives them; nothing is ranked."""
    heads = [m["title"] + (" ↑" if m["higher"] else " ↓") for m in block["metrics"]]
    return heads, [
        (r["method"], [(f"{r['values'][m['key']]:.{m['digits']}f}", None) for m in block["metrics"]])
        for r in block["rows"]
    ]
