"""Make rouge.json and stems.json: golden numbers from rouge-score and NLTK on texts invented here.

    pip install rouge-score==0.1.2
    python tests/golden/make_rouge.py

rouge.json: rows [prediction, reference, rouge1, rouge2, rougeL], F-measures rounded to 10 decimals.
stems.json: {word: stem}. The seed is fixed, so a second run writes the same files.
"""

import json
import random
from pathlib import Path

from nltk.stem.porter import PorterStemmer
from rouge_score.rouge_scorer import RougeScorer

HERE = Path(__file__).parent
STEM = PorterStemmer().stem
ROOTS = """act adopt ag agree analog band bat biolog box bubbl buzz cal canal care chang commun condit confl control cri
    decis defens digit effect electr fail fall feed fil fizz fl form fre fri gener geolog goe happ hesit hiss hop hopp
    id inn jo leg liv log magn mat mot nat oper organ ox own pla plast ply pon predic quadri radic rat re relat repl
    rol sens sk sky snow spr str stud syzyg tan th tr triplic tro us val vil wr yell youth""".split()
ENDINGS = """s sses ies ied ss eed ed ing y ying yed ly edly ational tional enci ency anci ancy izer bly alli ally
    entli ently eli ely ousli ously ization ation ator alism iveness ativeness fulness ousness aliti ality iviti
    ivity biliti bility fulli fully logi logy icate ative alize iciti icity ical ful ness al ance ence er ic able
    ible ant ement ment ent sion tion ion ou ism ate iti ous ive ize e ll lle yy rational ationalli gogy ated ating
    bled bling ized izing ering eding""".split()
SPECIAL = """skies sky dying lying tying news innings inning outings outing cannings canning howe proceed exceed succeed
    skis dies lies ties died lied tied flies flied say saying enjoy by yes yyy sayyed egg eggs add adding axed owing
    using aging oozed ebbing falling hissing fizzing plated tabled sized sing ing ed eed bed bled is as a i s ss
    sss""".split()
ODD = [
    "café",
    "naïve",
    "Ålesund",
    "\u0130stanbul",
    "\u0130",
    "ß",
    "\ufb01ne",
    "\u212a",
    "\u212aing",
    "ſ",
    "x²",
    "٣",
    "日本語",
    "漢字kanji",
    "한국",
    "привет",
    "Ωmega",
    "🙂",
    "e\u0301te\u0301",
    "don't",
    "can’t",
    "o'clock's",
    "snake_case",
    "__init__",
    "3.14",
    "1,000",
    "4th",
    "b2b",
    "2023",
    "007",
    "x=y+1",
    "C++",
    "a/b",
    "e-mail",
    "U.S.",
    "…",
    "—",
    "(",
    "!?",
    '"so"',
    "\n",
    "\n\n",
    "\t",
    "\u00a0",
    "\u2028",
    "\x00",
    "_",
    "<GIST>",
    "%",
]


def word(rng: random.Random) -> str:
    """A word of English build, seldom a real one: a root and up to two endings, or random letters and an ending."""
    if rng.random() < 0.04:
        return rng.choice(SPECIAL)
    root = (
        rng.choice(ROOTS)
        if rng.random() < 0.8
        else "".join(rng.choices("aeiouyybdlstzxw7", k=rng.randint(1, 4)))
    )
    return root + "".join(rng.choices(ENDINGS, k=rng.choice([0, 1, 1, 1, 2])))


def pair(rng: random.Random) -> tuple[str, str]:
    """Two texts over one small set of words and stems, the second often an edit of the first."""
    words = [word(rng) for _ in range(rng.randint(1, 3))] + [
        rng.choice(["the", "of", "a", "cat", "cats"])
    ]
    words += [STEM(w) for w in words]  # equals its word only if that is stemmed as it was
    if rng.random() < 0.4:
        words += rng.choices(ODD, k=2)
    a = rng.choices(words, k=rng.choice([0, 1, 2, 3, 4, 5, 6, 7]))
    b = rng.choices(words, k=rng.choice([0, 1, 2, 3, 4, 5, 6, 7]))
    if rng.random() < 0.5:
        b = [w for w in a if rng.random() < 0.8] + b[:2]
    space = rng.choice([" ", " ", " ", "  ", "\n", ", ", "-", "_"])
    a = [rng.choice([w, w, w, w.capitalize(), w.upper()]) for w in a]
    return space.join(a), " ".join(b) + rng.choice(["", ".", "!\n"])


def write_rows(path: Path, rows: list[str], brackets: str) -> None:
    path.write_text(
        brackets[0] + "\n" + ",\n".join(rows) + "\n" + brackets[1] + "\n", encoding="utf-8"
    )


def main() -> None:
    rng = random.Random(0)
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    pairs = [("", ""), ("", "a"), ("a", ""), ("?", "!"), (" ", "\n")]
    pairs += [pair(rng) for _ in range(3200)]
    pairs += [
        (
            " ".join(rng.choices("a b c d".split(), k=60)),
            " ".join(rng.choices("a b c d".split(), k=80)),
        )
        for _ in range(40)
    ]  # long ones, for the subsequences
    rows = []
    for prediction, reference in pairs:
        scores = scorer.score(reference, prediction)
        numbers = [round(scores[name].fmeasure, 10) for name in ("rouge1", "rouge2", "rougeL")]
        rows.append(json.dumps([prediction, reference, *numbers], ensure_ascii=False))
    write_rows(HERE / "rouge.json", rows, "[]")

    words = SPECIAL + [root + ending for ending in ENDINGS for root in rng.sample(ROOTS, 20)]
    words += [word(rng) for _ in range(1700)]
    write_rows(HERE / "stems.json", [f'"{w}": "{STEM(w)}"' for w in sorted(set(words))], "{}")


if __name__ == "__main__":
    main()
