# SPDX-License-Identifier: Apache-2.0
"""Students made from teachers, the taps at which their features are read, and the adapters between them."""

from fastdistill.models.adapters import Adapters
from fastdistill.models.blocks import BLOCK_SPECS, BlockSpec
from fastdistill.models.copying import CopyReport, copy_from_teacher
from fastdistill.models.specs import SPECS, StudentSpec, check_config, student_config, student_spec
from fastdistill.models.students import Student, check_parameters, make_student, student_taps
from fastdistill.models.taps import Taps

__all__ = [
    "BLOCK_SPECS",
    "SPECS",
    "Adapters",
    "BlockSpec",
    "CopyReport",
    "Student",
    "StudentSpec",
    "Taps",
    "check_config",
    "check_parameters",
    "copy_from_teacher",
    "make_student",
    "student_config",
    "student_spec",
    "student_taps",
]
