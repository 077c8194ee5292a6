"""Read SVHN's cropped digits: MATLAB files, opened only if their md5 is a published one."""

import hashlib
from pathlib import Path

from nrat_scale.core.errors import UserError
from nrat_scale.prepare.input import Classes, LabelledArrays
from nrat_scale.prepare.readers.checks import file_facts, reading

# http://ufldl.stanford.edu/housenumbers. SciPy trusts the sizes that a .mat file states: one wrong bit can crash the
# process, so files with another md5 are never parsed.
SVHN_MD5 = {
    "train_32x32.mat": "e26dedcc434d2e4c54c9b2d4a06d8373",
    "test_32x32.mat": "eb5a983be6a315427106f1b164d9cef3",
    "extra_32x32.mat": "a93ce644f1a588dc4d68dda5feec44a7",
}


def read_svhn(path: Path) -> LabelledArrays:
    """One of SVHN's published files of cropped digits, RGB 32 x 32."""
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise UserError("SVHN's files are read with SciPy, which is missing: pip install scipy") from error
    with reading(path, "SVHN file"), open(path, "rb") as file:
        md5 = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
        if md5 not in SVHN_MD5.values():
            found = f"The SVHN file {path} has md5 {md5}, expected that of {', '.join(SVHN_MD5)} as published"
            raise UserError(f"{found}. Download it again from http://ufldl.stanford.edu/housenumbers.")
        file.seek(0)
        arrays = loadmat(file)
    images = arrays["X"].transpose(3, 0, 1, 2)  # from [32, 32, 3, N]
    labels = arrays["y"].reshape(-1).astype("int64") % 10  # 10 is the digit 0
    return LabelledArrays.of(images, labels, Classes("svhn"), [file_facts(path, "SVHN file")])
