"""Recipes for drafters: DFlash and EAGLE-3, trained on what the target says and on its hidden states.

prompts -> target -> its own replies (`regenerate`) -> rows -> hidden states -> loss -> public files of a drafter
"""
