"""The attacks by name."""

from tests.hostile.attack import Attack
from tests.hostile.attacks_of_members import arguments, credentials, members, numbers
from tests.hostile.attacks_of_strangers import memory, strangers

ATTACKS: tuple[Attack, ...] = (
    *numbers(),
    *strangers(),
    *memory(),
    *members(),
    *arguments(),
    *credentials(),
)
