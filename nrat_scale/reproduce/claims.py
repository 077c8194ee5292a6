"""The paper's claims, with the numbers that it prints for them. `decision.py` decides them, `findings.py` writes the page."""

from collections.abc import Iterable

from nrat_scale.reproduce.decision import Claim, Effect, Term
from nrat_scale.reproduce.measured import RELEASED, Setting
from nrat_scale.reproduce.paper import printed

Noise = tuple[str, float]
CLEAN, SYMMETRIC_2, SYMMETRIC = ("none", 0.0), ("symmetric", 0.2), ("symmetric", 0.4)
ASYMMETRIC_2, ASYMMETRIC = ("asymmetric", 0.2), ("asymmetric", 0.4)
_NAMES = {"natural": "natural", "pgd20": "PGD-20", "cw20": "CW-20", "aa": "AutoAttack"}
_METHODS = {
    "pgd_at": "PGD-AT", "pgd_at_apl": "PGD-AT-APL", "mart": "MART", "mart_apl": "MART-APL", "trades": "TRADES",
    "trades_apl": "TRADES-APL", "nrat": "NRAT", "trades_awp": "TRADES-AWP", "nrat_awp": "NRAT-AWP",
    "trades-sym_kl": "CE + symKL",
    "nrat-inner-ce": "NRAT (inner CE)", "nrat-inner-sym_kl": "NRAT (inner symKL)", "nrat-inner-nce_rce": "NRAT (inner NCE+RCE)",
    "nrat-lam3": "NRAT (lam 3)", "nrat-lam12": "NRAT (lam 12)",
    "trades_apl-lam3": "TRADES-APL (lam 3)", "trades_apl-lam12": "TRADES-APL (lam 12)",
}  # fmt: skip


def _noise_text(noise: Noise) -> str:
    return Setting("", *noise).noise_text


def _minus(
    one: str,
    other: str,
    noise: Noise,
    measure: str,
    checkpoint: str = "best",
    *,
    decides: bool = True,
    no_gain: bool = False,
) -> Effect:
    """One method minus another one at the same noise."""
    terms = tuple(Term(sign, Setting(method, *noise), checkpoint, measure) for sign, method in ((1, one), (-1, other)))
    text = f"{_METHODS[one]} − {_METHODS[other]}, {_NAMES[measure]}, {checkpoint}, {_noise_text(noise)}"
    return Effect(text, terms, no_gain=no_gain, decides=decides)


def _gap_terms(method: str, noise: Noise, measure: str, sign: float = 1) -> tuple[Term, Term]:
    setting = Setting(method, *noise)
    return Term(sign, setting, "best", measure), Term(-sign, setting, "last", measure)


def _gap(method: str, noise: Noise, measure: str, *, decides: bool = True) -> Effect:
    """Best minus last."""
    text = f"{_METHODS[method]}, best − last, {_NAMES[measure]}, {_noise_text(noise)}"
    return Effect(text, _gap_terms(method, noise, measure), decides=decides)


def _gap_closed(one: str, other: str, noise: Noise, measure: str, *, decides: bool = True) -> Effect:
    """How much smaller best minus last is for `other` than for `one`."""
    text = f"best − last of {_METHODS[one]} minus that of {_METHODS[other]}, {_NAMES[measure]}, {_noise_text(noise)}"
    return Effect(text, _gap_terms(one, noise, measure) + _gap_terms(other, noise, measure, -1), decides=decides)


def _below(points: float, method: str, noise: Noise, measure: str, *, decides: bool = True) -> Effect:
    """How far best minus last is below a number of points."""
    text = f"{points:g} points minus (best − last) of {_METHODS[method]}, {_NAMES[measure]}, {_noise_text(noise)}"
    return Effect(text, _gap_terms(method, noise, measure, -1), points, decides=decides)


def _cost_of_noise(method: str, noise: Noise, measure: str, *, decides: bool = True) -> Effect:
    terms = tuple(Term(sign, Setting(method, *one), "best", measure) for sign, one in ((1, CLEAN), (-1, noise)))
    return Effect(f"{_METHODS[method]}, clean − {_noise_text(noise)}, {_NAMES[measure]}, best", terms, decides=decides)


def _drop(method: str, noise: Noise, *, than: str | None = None) -> Effect:
    """PGD-20 minus AutoAttack of a method, or how much larger it is than that of another one."""
    terms = tuple(Term(sign, Setting(method, *noise), "best", measure) for sign, measure in ((1, "pgd20"), (-1, "aa")))
    text = f"PGD-20 − AutoAttack of {_METHODS[method]}"
    if than is not None:
        terms += tuple(
            Term(sign, Setting(than, *noise), "best", measure) for sign, measure in ((-1, "pgd20"), (1, "aa"))
        )
        text += f" minus that of {_METHODS[than]}"
    return Effect(f"{text}, best, {_noise_text(noise)}", terms, decides=than is not None)


def _inflation(method: str, noise: Noise) -> Effect:
    terms = tuple(
        Term(sign, Setting(method, *noise), "best", "aa", space) for sign, space in ((1, RELEASED), (-1, "pixel"))
    )
    return Effect(
        f"{_METHODS[method]}, released code's space − pixel space, AutoAttack, best, {_noise_text(noise)}", terms
    )


def _quote(method: str, noise: Noise, measure: str, checkpoint: str = "best") -> str:
    value = printed(Setting(method, *noise), checkpoint, measure)
    assert value is not None, (method, noise, measure)
    return f"{value:.2f}"


def claims() -> list[Claim]:
    """Every claim, in the order of the page; the quoted numbers are those of paper.csv."""
    return [*_noise_claims(), *_comparisons(), *_loss_claims(), *_training_claims(), *_oddities()]


def _noise_claims() -> Iterable[Claim]:
    yield Claim(
        "Label noise hurts",
        f"Accuracy falls with the noise rate: PGD-AT's AutoAttack from {_quote('pgd_at', CLEAN, 'aa')} to "
        f"{_quote('pgd_at', SYMMETRIC, 'aa')} % and its natural accuracy from {_quote('pgd_at', CLEAN, 'natural')} to "
        f"{_quote('pgd_at', SYMMETRIC, 'natural')} % at symmetric 0.4. In the printed numbers the AutoAttack "
        "of NRAT and TRADES-APL rises; both have losses against noise.",
        tuple(
            _cost_of_noise(method, noise, measure, decides=noise == SYMMETRIC and method in ("pgd_at", "trades"))
            for noise in (SYMMETRIC, SYMMETRIC_2, ASYMMETRIC, ASYMMETRIC_2)
            for method in ("pgd_at", "trades", "trades_apl", "nrat")
            for measure in ("natural", "aa")
        ),
    )
    yield Claim(
        "Double overfitting",
        f"Under noise natural accuracy, too, falls after some epoch: best minus last of TRADES at symmetric 0.4 is "
        f"{_quote('trades', SYMMETRIC, 'natural')} minus {_quote('trades', SYMMETRIC, 'natural', 'last')} %, of MART "
        f"{_quote('mart', SYMMETRIC, 'natural')} minus {_quote('mart', SYMMETRIC, 'natural', 'last')} %.",
        tuple(
            _gap(method, noise, measure, decides=noise == SYMMETRIC)
            for noise in (SYMMETRIC, SYMMETRIC_2, ASYMMETRIC)
            for method in ("pgd_at", "trades", "mart")
            for measure in ("natural", "pgd20")
        ),
    )
    yield Claim(
        "APL losses reduce double overfitting",
        f"They largely remove it. Best minus last of TRADES-APL at symmetric 0.4: natural {_quote('trades_apl', SYMMETRIC, 'natural')} minus "
        f"{_quote('trades_apl', SYMMETRIC, 'natural', 'last')} %.",
        tuple(
            _gap_closed(plain, apl, noise, measure, decides=noise == SYMMETRIC and plain == "trades")
            for noise in (SYMMETRIC, SYMMETRIC_2)
            for plain, apl in (("trades", "trades_apl"), ("mart", "mart_apl"))
            for measure in ("natural", "pgd20")
        ),
    )


def _comparisons() -> Iterable[Claim]:
    yield Claim(
        "NRAT is the most robust under noise",
        f"AutoAttack at symmetric 0.4: NRAT {_quote('nrat', SYMMETRIC, 'aa')}, TRADES-APL {_quote('trades_apl', SYMMETRIC, 'aa')}, "
        f"TRADES {_quote('trades', SYMMETRIC, 'aa')}, PGD-AT {_quote('pgd_at', SYMMETRIC, 'aa')} %; at asymmetric 0.4 "
        f"{_quote('nrat', ASYMMETRIC, 'aa')}, {_quote('trades_apl', ASYMMETRIC, 'aa')}, {_quote('trades', ASYMMETRIC, 'aa')} and "
        f"{_quote('pgd_at', ASYMMETRIC, 'aa')} %.",
        (
            *(
                _minus("nrat", other, noise, "aa", decides=noise in (SYMMETRIC, ASYMMETRIC))
                for noise in (SYMMETRIC, ASYMMETRIC, SYMMETRIC_2, ASYMMETRIC_2)
                for other in ("trades_apl", "trades", "pgd_at", "mart", "mart_apl")
            ),
            *(
                _minus(f"nrat{lam}", f"trades_apl{other}", SYMMETRIC, "aa", decides=False)
                for lam, other in (
                    ("-lam3", "-lam3"),
                    ("-lam12", "-lam12"),
                    ("-lam3", ""),
                    ("-lam12", ""),
                    ("", "-lam3"),
                    ("", "-lam12"),
                )
            ),
        ),
    )
    yield Claim(
        "TRADES is the most robust without noise",
        f"AutoAttack with clean labels: TRADES {_quote('trades', CLEAN, 'aa')}, PGD-AT {_quote('pgd_at', CLEAN, 'aa')}, TRADES-APL "
        f"{_quote('trades_apl', CLEAN, 'aa')}, NRAT {_quote('nrat', CLEAN, 'aa')} %.",
        tuple(_minus("trades", other, CLEAN, "aa") for other in ("nrat", "trades_apl", "pgd_at")),
    )


def _loss_claims() -> Iterable[Claim]:
    yield Claim(
        "APL helps under symmetric noise",
        f"At symmetric 0.4 TRADES-APL has {_quote('trades_apl', SYMMETRIC, 'natural')} % natural and "
        f"{_quote('trades_apl', SYMMETRIC, 'aa')} % AutoAttack, TRADES {_quote('trades', SYMMETRIC, 'natural')} and "
        f"{_quote('trades', SYMMETRIC, 'aa')} %.",
        tuple(
            _minus(apl, plain, noise, measure, decides=noise == SYMMETRIC and plain == "trades")
            for noise in (SYMMETRIC, SYMMETRIC_2)
            for apl, plain in (("trades_apl", "trades"), ("mart_apl", "mart"))
            for measure in ("natural", "aa")
        ),
    )
    yield Claim(
        "APL may fail for direct objectives under asymmetric noise (Proposition 1)",
        f"In MART, whose loss is on the attacked images, APL does not help at asymmetric 0.4: AutoAttack of MART-APL "
        f"{_quote('mart_apl', ASYMMETRIC, 'aa')} against {_quote('mart', ASYMMETRIC, 'aa')} %.",
        (
            *(
                _minus(apl, plain, noise, measure, no_gain=True, decides=noise == ASYMMETRIC and plain == "mart")
                for noise in (ASYMMETRIC, ASYMMETRIC_2)
                for apl, plain in (("mart_apl", "mart"), ("pgd_at_apl", "pgd_at"))
                for measure in ("natural", "aa")
            ),
            # The contrast: TRADES' loss is on natural images.
            *(_minus("trades_apl", "trades", ASYMMETRIC, measure, decides=False) for measure in ("natural", "aa")),
        ),
        "PGD-AT-APL is the other direct objective; TRADES-APL, whose APL loss is on natural images, is the contrast.",
    )
    yield Claim(
        "symKL is more robust than KL",
        f"NRAT is TRADES-APL with symKL instead of KL; AutoAttack at symmetric 0.4 {_quote('nrat', SYMMETRIC, 'aa')} against "
        f"{_quote('trades_apl', SYMMETRIC, 'aa')} %.",
        (
            *(_minus("nrat", "trades_apl", noise, "aa", decides=noise == SYMMETRIC) for noise in (SYMMETRIC, CLEAN)),
            *(_minus("trades-sym_kl", "trades", noise, "aa", decides=False) for noise in (SYMMETRIC, CLEAN)),
        ),
    )
    yield Claim(
        "symKL costs natural accuracy",
        f"Natural accuracy at symmetric 0.4: TRADES-APL {_quote('trades_apl', SYMMETRIC, 'natural')}, NRAT "
        f"{_quote('nrat', SYMMETRIC, 'natural')} %.",
        (
            *(
                _minus("trades_apl", "nrat", noise, "natural", decides=noise == SYMMETRIC)
                for noise in (SYMMETRIC, CLEAN)
            ),
            *(_minus("trades", "trades-sym_kl", noise, "natural", decides=False) for noise in (SYMMETRIC, CLEAN)),
        ),
    )


def _training_claims() -> Iterable[Claim]:
    yield Claim(
        "AWP narrows best minus last",
        f"Best minus last of PGD-20 at symmetric 0.4: NRAT {_quote('nrat', SYMMETRIC, 'pgd20')} minus "
        f"{_quote('nrat', SYMMETRIC, 'pgd20', 'last')}, NRAT-AWP {_quote('nrat_awp', SYMMETRIC, 'pgd20')} minus "
        f"{_quote('nrat_awp', SYMMETRIC, 'pgd20', 'last')} %: below 5 points.",
        (
            *(
                _gap_closed("nrat", "nrat_awp", noise, "pgd20", decides=noise == SYMMETRIC)
                for noise in (SYMMETRIC, SYMMETRIC_2, ASYMMETRIC)
            ),
            *(
                _below(5, "nrat_awp", noise, "pgd20", decides=noise == SYMMETRIC)
                for noise in (SYMMETRIC, SYMMETRIC_2, ASYMMETRIC)
            ),
            _gap_closed("trades", "trades_awp", SYMMETRIC, "pgd20", decides=False),
        ),
        "The paper does not give NRAT-AWP's gamma; it is 0.005 here.",
    )
    yield Claim(
        "The proposed loss as inner loss is better",
        f"Appendix D attacks with the proposed loss instead of CE: AutoAttack at symmetric 0.4 "
        f"{_quote('nrat-inner-nce_rce', SYMMETRIC, 'aa')} against {_quote('nrat', SYMMETRIC, 'aa')} %.",
        (
            *(
                _minus(
                    f"nrat-inner-{one}", "nrat-inner-ce", noise, "aa", decides=noise == SYMMETRIC and one == "nce_rce"
                )
                for noise in (SYMMETRIC, ASYMMETRIC)
                for one in ("nce_rce", "sym_kl")
            ),
            _minus("nrat", "nrat-inner-ce", SYMMETRIC, "aa", decides=False),
        ),
        "We read the proposed loss as NCE+RCE on the attacked images. symKL, the other reading, is shown and does not decide. NRAT itself "
        "attacks with KL, as the released code does.",
    )


def _oddities() -> Iterable[Claim]:
    collapse = [
        Term(1, Setting("pgd_at_apl", *SYMMETRIC), "best", "pgd20"),
        Term(-1, Setting("pgd_at_apl", *SYMMETRIC), "best", "natural"),
    ]
    yield Claim(
        "PGD-AT-APL collapses: robust above natural accuracy",
        "Tried and left out of the tables: natural accuracy below 30 %, robust accuracy above 60 %, without an explanation. Under an "
        "attack of the evaluated model robust accuracy cannot exceed natural accuracy by much.",
        (
            Effect("PGD-AT-APL, PGD-20 − natural, best, symmetric 0.4", tuple(collapse)),
            _minus("pgd_at", "pgd_at_apl", SYMMETRIC, "natural"),
            _minus("pgd_at", "pgd_at_apl", CLEAN, "natural", decides=False),
            _minus("pgd_at", "pgd_at_apl", SYMMETRIC, "aa", decides=False),
        ),
    )
    yield Claim(
        "NRAT loses more from PGD-20 to AutoAttack than TRADES without noise",
        f"With clean labels NRAT has {_quote('nrat', CLEAN, 'pgd20')} % under PGD-20, {_quote('nrat', CLEAN, 'cw20')} % under CW-20 and "
        f"{_quote('nrat', CLEAN, 'aa')} % under AutoAttack; TRADES {_quote('trades', CLEAN, 'pgd20')}, {_quote('trades', CLEAN, 'cw20')} and "
        f"{_quote('trades', CLEAN, 'aa')} %. A wide gap is a sign of gradient masking.",
        (
            _drop("nrat", CLEAN, than="trades"),
            _drop("nrat", CLEAN),
            _drop("nrat", SYMMETRIC),
            _drop("trades", SYMMETRIC),
        ),
        "Parts of AutoAttack do not decide the comparison: Square, which masked gradients do not stop, has to be among them. A gap to parts "
        "is a lower bound of the gap to all of AutoAttack.",
        whole_attack=True,
    )
    yield Claim(
        "The released code's threat space inflates robustness",
        "Not a claim of the paper. Its released code attacks normalised pixels with eps = 8/255 and clamps them to [0, 1], which is about "
        "a quarter of the stated radius.",
        (_inflation("nrat", SYMMETRIC), _inflation("trades", SYMMETRIC), _inflation("pgd_at", SYMMETRIC)),
        "Differences between cells that were trained and evaluated in either space, on the same test images.",
    )
