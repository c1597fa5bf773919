#!/bin/sh
# A tour of the API with curl 7.76 or newer. Settings, from the environment:
#   BASE      where the service is; http://localhost:8001
#   API_KEY   when the service asks for one
#   INSECURE  any value: trust a self-signed certificate
set -eu

BASE=${BASE:-http://localhost:8001}
API_KEY=${API_KEY:-}
INSECURE=${INSECURE:-}
course='Knots for climbers: figure eight, clove hitch, prusik. Practical exam on the wall.'
request="{\"content\": \"$course\", \"badge_level\": \"Beginner\", \"seed\": 1}"
badge='{
  "badge_name": "Climbing Knots",
  "badge_description": "Recognises learners who tie and check the knots that climbers rely on.",
  "criteria": {"narrative": "Tied six knots unaided and inspected those of a partner."}
}'

case $BASE in
    https:*) http2=--http2 ;;
    *) http2=--http2-prior-knowledge ;;
esac

# show WORDS: what the next step shows.
show() {
    printf '\n== %s\n' "$*"
}

# call PATH [CURL OPTION]…
call() {
    path=$1
    shift
    curl --silent --show-error --fail-with-body "$http2" ${INSECURE:+--insecure} \
        ${API_KEY:+--header "Authorization: Bearer $API_KEY"} "$@" "$BASE$path"
}

# post PATH JSON [CURL OPTION]…
post() {
    path=$1 json=$2
    shift 2
    call "$path" --header 'Content-Type: application/json' --data "$json" "$@"
}

# begin: starts a generation that nobody waits for, and prints its id.
begin() {
    accepted=$(post /generate "$request" --header 'Prefer: respond-async')
    printf '%s' "$accepted" | sed 's/.*"id": *"\([^"]*\)".*/\1/'
}

show 'Health: engine, model, queue'
call /health

show 'One badge as JSON'
post /generate "$request" --write-out '\n(status %{http_code} over HTTP/%{http_version})\n'

show 'The same as events while it is written: position in the queue, tokens, the badge so far, the badge'
post '/generate/stream?accumulated=false&partial=true' "$request" --no-buffer

show 'The same with GET, as an EventSource asks'
call /generate/stream --no-buffer --get --data-urlencode "content=$course" --data accumulated=false

show 'Asynchronously: begin, follow its events as often as you like, fetch the result'
id=$(begin)
call "/generations/$id/events?accumulated=false" --no-buffer
call "/generations/$id"

show 'Cancel: the model stops, and the state says so'
id=$(begin)
call "/generations/$id" --request DELETE
call "/generations/$id"

show 'One field of a badge anew, the others as they are'
post /regenerate-field "{\"content\": \"$course\", \"field\": \"badge_name\", \"badge\": $badge}"

show 'An unsigned Open Badges 3.0 credential of an edited badge'
post /credentials "{\"badge\": $badge, \"issuer\": {\"id\": \"https://example.edu/\", \"name\": \"Example University\"}}"
echo
