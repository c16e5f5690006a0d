// Render Go templates as Ollama does, so that tests can compare the texts with those of the Jinja template.
//
// The input is a JSON list of {"Template", "Chats": [[{"Role", "Content"}]]}; the output is a list of texts for
// each. Like Ollama's collate (template/template.go), it merges neighbouring turns of one role, joins all system
// texts into .System, and keeps the system turns in .Messages.
package main

import (
	"encoding/json"
	"log"
	"os"
	"strings"
	"text/template"
)

type message struct{ Role, Content string }

type job struct {
	Template string
	Chats    [][]message
}

func render(parsed *template.Template, chat []message) string {
	var systems []string
	var turns []*message
	for i := range chat {
		next := &chat[i]
		if next.Role == "system" {
			systems = append(systems, next.Content)
		}
		if n := len(turns); n > 0 && turns[n-1].Role == next.Role && next.Role != "tool" {
			turns[n-1].Content += "\n\n" + next.Content
			continue
		}
		turns = append(turns, next)
	}
	var out strings.Builder
	err := parsed.Execute(&out, map[string]any{
		"System": strings.Join(systems, "\n\n"), "Messages": turns, "Response": "",
	})
	if err != nil {
		log.Fatal(err)
	}
	return out.String()
}

func main() {
	var jobs []job
	if err := json.NewDecoder(os.Stdin).Decode(&jobs); err != nil {
		log.Fatal(err)
	}
	texts := make([][]string, len(jobs))
	for i, j := range jobs {
		parsed, err := template.New("").Option("missingkey=zero").Parse(j.Template)
		if err != nil {
			log.Fatal(err)
		}
		for _, chat := range j.Chats {
			texts[i] = append(texts[i], render(parsed, chat))
		}
	}
	if err := json.NewEncoder(os.Stdout).Encode(texts); err != nil {
		log.Fatal(err)
	}
}
