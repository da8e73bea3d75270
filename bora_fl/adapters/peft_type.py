"""The PEFT type `BORA`, added to PEFT's closed enumeration.

`register_peft_method` accepts only members of `peft.utils.PeftType`, and saved configs name their type by its value,
so an out-of-tree method needs a real member: one that pickles, copies, serializes and is found by value.
"""

from __future__ import annotations

from peft.utils import PeftType

_NAME = "BORA"


def _extend_peft_type() -> PeftType:
    """Return `PeftType.BORA`, adding it on the first call."""
    if _NAME in PeftType.__members__:
        return PeftType[_NAME]
    member = str.__new__(PeftType, _NAME)
    member._name_ = _NAME
    member._value_ = _NAME
    member._sort_order_ = len(PeftType.__members__)
    member.__objclass__ = PeftType
    # The class refuses to rebind the name of a member, so the attribute comes before the entry in the member map.
    setattr(PeftType, _NAME, member)
    PeftType._member_names_.append(_NAME)
    PeftType._member_map_[_NAME] = member
    PeftType._value2member_map_[_NAME] = member
    return member


BORA: PeftType = _extend_peft_type()
