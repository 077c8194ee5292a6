"""Specs of the data section refuse contradictions before any file is opened."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from nrat_scale.core.errors import UserError
from nrat_scale.data.augment import AugmentSpec
from nrat_scale.data.spec import DataSpec, GeneratedSpec, RealSpec, RemoteSpec, ValidationSpec

SPEC = DataSpec(real=RealSpec("x"), generated=GeneratedSpec("y"))
WRONG: list[tuple[Callable[[], object], str]] = [
    (lambda: DataSpec(), "Nothing to train on"),
    (lambda: DataSpec(real=RealSpec("x"), validation=ValidationSpec("generated")), "generated.shards is not set"),
    (lambda: replace(SPEC, batch_size=0), "data.batch_size is 0; it must be at least 1"),
    (lambda: replace(SPEC, epoch_samples=-1), "data.epoch_samples is -1"),
    (lambda: replace(SPEC, window=-1), "data.window is -1"),
    (lambda: replace(SPEC, max_bad_shards=0), "data.max_bad_shards is 0"),
    (lambda: replace(SPEC, loader="index"), "data.loader is 'index'. Did you mean 'indexed'"),
    (lambda: replace(SPEC, resident="alway"), "data.resident is 'alway'. Did you mean 'always'"),
    (lambda: replace(SPEC, on_bad_shard="go"), "data.on_bad_shard is 'go'"),
    (
        lambda: replace(SPEC, loader="webdataset", augment=AugmentSpec(cutmix=0.5)),
        "does not support data.augment.cutmix",
    ),
    (lambda: replace(SPEC, loader="webdataset", resident="always"), "does not support data.resident always"),
    (lambda: replace(SPEC, real=RealSpec("https://x"), resident="always"), "only local shards can be kept"),
    (lambda: replace(SPEC, batch_size=3, generated=GeneratedSpec("y", 0.3)), "3 real and 0 generated images"),
    (lambda: RealSpec(""), "data.real.shards is ''; it must be a folder, an address or null"),
    (lambda: RealSpec("x", exclude=""), "data.real.exclude is ''; it must be an .npy file or null"),
    (lambda: GeneratedSpec(""), "data.generated.shards is ''"),
    (lambda: GeneratedSpec("x", exclude=""), "data.generated.exclude is ''"),
    (lambda: GeneratedSpec("x", 0.0), "data.generated.fraction is 0.0"),
    (lambda: ValidationSpec(size=0), "data.validation.size is 0"),
    (lambda: ValidationSpec(source="reel"), "data.validation.source is 'reel'. Did you mean 'real'"),
    (lambda: ValidationSpec(take="last"), "data.validation.take is 'last'"),
    (lambda: ValidationSpec(labels="true"), "data.validation.labels is 'true'"),
    (lambda: RemoteSpec(cache_gb=0), "data.remote.cache_gb is 0"),
    (lambda: AugmentSpec(crop=-1), "data.augment.crop is -1"),
    (lambda: AugmentSpec(cutmix=1.5), "data.augment.cutmix is 1.5"),
]


@pytest.mark.parametrize(("make", "message"), WRONG, ids=[message for _, message in WRONG])
def test_contradictions_are_refused(make: Callable[[], object], message: str) -> None:
    """Each spec validates itself, and the message names the key."""
    with pytest.raises(UserError, match=message):
        make()
