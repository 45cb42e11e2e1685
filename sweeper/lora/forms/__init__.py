"""The forms of adapters, one file each, and what an adapter of any form may carry: sparse patterns, restarts."""

from sweeper.lora.forms.dora import DORA
from sweeper.lora.forms.form import FORMS, AdapterSpec, Attached, Capacity, Form
from sweeper.lora.forms.lora import LORA
from sweeper.lora.forms.restarts import Restarts
from sweeper.lora.forms.sparse import Sparsity
from sweeper.lora.forms.vera import VERA

__all__ = ["FORMS", "AdapterSpec", "Attached", "Capacity", "Form", "Restarts", "Sparsity"]

FORMS |= {form.name: form for form in (LORA, DORA, VERA)}
