"""Which publication each preset of `presets.OBJECTIVES` is, with the citations; the licences that the Hub knows."""

# Preset -> its origin. A key of `PAPERS` in it becomes a citation of the model card.
ORIGINS = {
    "natural": "plain training, without an attack",
    "pgd_at": "published: Madry et al. 2018",
    "pgd_at_apl": "published: a baseline of NRAT 2024, PGD-AT (Madry et al. 2018) with NCE+RCE (Ma et al. 2020)",
    "trades": "published: Zhang et al. 2019",
    "trades_apl": "published: a baseline of NRAT 2024, TRADES (Zhang et al. 2019) with NCE+RCE (Ma et al. 2020)",
    "nrat": "published: NRAT 2024",
    "mart": "published: Wang et al. 2020",
    "mart_apl": "published: a baseline of NRAT 2024, MART (Wang et al. 2020) with NCE+RCE (Ma et al. 2020)",
    "dm_at": "published: Wang et al. 2023",
    "trades_gce": "a combination of ours: TRADES (Zhang et al. 2019) with GCE (Zhang and Sabuncu 2018) as natural term",
    "trades_sce": "a combination of ours: TRADES (Zhang et al. 2019) with SCE (Wang et al. 2019) as natural term",
    "trades_nfl_rce": "a combination of ours: TRADES (Zhang et al. 2019) with NFL+RCE (Ma et al. 2020) as natural term",
    "trades_agce": "a combination of ours: TRADES (Zhang et al. 2019) with AGCE (Zhou et al. 2021) as natural term",
    "adr": "published: ADR, Wu et al. 2024",
    "trades_adr": "published: ADR with TRADES, Wu et al. 2024",
    "te": "published: PGD-AT+TE, Dong et al. 2022",
    "trades_te": "published: TRADES+TE, Dong et al. 2022",
    "sglr": "published: SGLR, Li et al. 2024, as in the authors' code",
    "noilin": "published: NoiLIn, Zhang et al. 2022",
    "trades_noilin": "published: TRADES-NoiLIn, Zhang et al. 2022",
    "trades_ikl": "published: IKL-AT, Cui et al. 2024",
    "nrat_ikl": "a combination of ours: NRAT 2024 with the divergence of Cui et al. 2024",
    "score": "published: Pang et al. 2022, as in the code of Wang et al. 2023",
}

PAPERS = {
    "NRAT 2024": "*NRAT: towards adversarial training with inherent label noise*, Machine Learning, 2024",
    "Zhang et al. 2019": "Zhang et al., *Theoretically Principled Trade-off between Robustness and Accuracy*, ICML 2019, "
    "arXiv:1901.08573 (TRADES)",
    "Wang et al. 2020": "Wang et al., *Improving Adversarial Robustness Requires Revisiting Misclassified Examples*, ICLR 2020 "
    "(MART)",
    "Madry et al. 2018": "Madry et al., *Towards Deep Learning Models Resistant to Adversarial Attacks*, ICLR 2018, "
    "arXiv:1706.06083 (PGD-AT)",
    "Wang et al. 2023": "Wang et al., *Better Diffusion Models Further Improve Adversarial Training*, ICML 2023, "
    "arXiv:2302.04638 (DM_AT)",
    "Ma et al. 2020": "Ma et al., *Normalized Loss Functions for Deep Learning with Noisy Labels*, ICML 2020, "
    "arXiv:2006.13554 (NCE+RCE)",
    "Zhang and Sabuncu 2018": "Zhang and Sabuncu, *Generalized Cross Entropy Loss for Training Deep Neural Networks with "
    "Noisy Labels*, NeurIPS 2018, arXiv:1805.07836 (GCE)",
    "Wang et al. 2019": "Wang et al., *Symmetric Cross Entropy for Robust Learning with Noisy Labels*, ICCV 2019, "
    "arXiv:1908.06112 (SCE)",
    "Cui et al. 2024": "Cui et al., *Decoupled Kullback-Leibler Divergence Loss*, NeurIPS 2024, arXiv:2305.13948 (IKL)",
    "Pang et al. 2022": "Pang et al., *Robustness and Accuracy Could Be Reconcilable by (Proper) Definition*, ICML 2022, "
    "arXiv:2202.10103 (SCORE)",
    "Zhou et al. 2021": "Zhou et al., *Asymmetric Loss Functions for Learning with Noisy Labels*, ICML 2021, arXiv:2106.03110 (AGCE)",
    "Wu et al. 2024": "Wu, Wang and Chen, *Annealing Self-Distillation Rectification Improves Adversarial Training*, ICLR 2024, "
    "arXiv:2305.12118 (ADR)",
    "Dong et al. 2022": "Dong et al., *Exploring Memorization in Adversarial Training*, ICLR 2022, arXiv:2106.01606 (TE)",
    "Li et al. 2024": "Li et al., *Soften to Defend: Towards Adversarial Robustness via Self-Guided Label Refinement*, CVPR 2024, "
    "arXiv:2403.09101 (SGLR)",
    "Zhang et al. 2022": "Zhang et al., *NoiLIn: Improving Adversarial Training and Correcting Stereotype of Noisy Labels*, "
    "TMLR 2022, arXiv:2105.14676 (NoiLIn)",
    "Croce and Hein 2020": "Croce and Hein, *Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse "
    "Parameter-free Attacks*, ICML 2020, arXiv:2003.01690 (AutoAttack)",
}

# Identifiers of licences in a model card: https://huggingface.co/docs/hub/repositories-licenses (August 2026).
_LICENSES = """
afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5
cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0
cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0
etalab-2.0 eupl-1.1 eupl-1.2 fair-noncommercial-research-license gemma gfdl gpl gpl-2.0 gpl-3.0
grok2-community h-research intel-research isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2
llama3.3 llama4 lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 openmdw-1.0 openmdw-1.1 openrail
openrail++ osl-3.0 other pddl postgresql unknown unlicense wtfpl zlib
"""
LICENSES = frozenset(_LICENSES.split())
