"""Completion in bash: `eval "$(.venv/bin/python train.py -sc install=bash)"`.

Hydra answers what may follow, but its own script takes the interpreter for the program where that is called by a path,
as `.venv/bin/python` is, and completes no second value of a comma list.
"""

INSTALL = r"""
_lora_atlas_complete() {
    local program=${COMP_WORDS[0]} script=${COMP_WORDS[1]}
    if [[ $program == *lora-atlas && $COMP_CWORD == 1 ]]; then
        COMPREPLY=($(compgen -W "train evaluate adapters analyse fetch" -- "$script"))
        return
    fi
    case "$program $script" in
        *python*" "*train.py | *lora-atlas" train") ;;
        *) return ;;  # of another script: what bash does by default
    esac
    local typed="${COMP_LINE:0:$COMP_POINT}"
    typed="${typed##* }"
    # of a list its last value is asked for
    local before="" asked="$typed"
    if [[ $typed == *=*,* ]]; then
        before="${typed%,*},"
        asked="${typed%%=*}=${typed##*,}"
    fi
    # what bash takes for words of their own, since = and : end a word
    local passed="${typed%"${typed##*[=:]}"}"
    [[ $COMP_WORDBREAKS == *=* ]] || passed=""
    local others="${COMP_LINE:0:$COMP_POINT}"
    others="${others#*"$script"}"
    others="${others%"$typed"}"
    others="$(sed -E 's/(^| )-[^ ]*//g' <<<"$others")"
    local choice
    for choice in $(COMP_LINE="train.py $others $asked" "$program" "$script" -sc query=bash 2>/dev/null); do
        [[ -n $before ]] && choice="$before${choice#*=}"
        [[ $choice == "$typed"* ]] && COMPREPLY+=("${choice#"$passed"}")
    done
    compopt -o nospace
}
complete -o default -F _lora_atlas_complete python python3 lora-atlas
"""
UNINSTALL = "complete -r python python3 lora-atlas; unset -f _lora_atlas_complete"
SCRIPTS = {"install=bash": INSTALL.strip(), "uninstall=bash": UNINSTALL}
"""What is asked of `-sc` -> the script that bash is to carry out."""
