# Sourced by scripts that run one long command after another. Bash alone would leave a command behind when it is killed.
#
# foreground COMMAND …   runs it, hands SIGTERM, SIGINT and SIGHUP on to it as SIGTERM, waits until it has saved and left,
#                        and returns its status.
foreground() {
    local child status asked=0
    "$@" &
    child=$!
    trap 'asked=1; kill -TERM "$child" 2>/dev/null || true' TERM INT HUP
    while true; do
        status=0
        wait "$child" || status=$?
        kill -0 "$child" 2>/dev/null || break  # a signal ends the wait, not the command
    done
    trap - TERM INT HUP
    if ((asked && status == 0)); then status=143; fi  # it ended by itself meanwhile; what comes after it must not begin
    return "$status"
}
