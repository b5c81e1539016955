"""One file a stage, each with its record `STAGE`; `stage_order.py` has the list of them."""
