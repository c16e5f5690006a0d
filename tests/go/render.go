// Render Go templates as Ollama does, so that tests can compare the texts with those of others.
//
// The input is a JSON list of {"Template", "Chats": [{"messages", "tools", "think"}]} in the format of Ollama's API; the
// output is a list of texts for each. Like Ollama (template/template.go, api/types.go), it merges neighbouring turns of
// one role, joins all system texts into .System, keeps the system turns in .Messages, and reads tools into types.
package main

import (
	"encoding/json"
	"log"
	"os"
	"strings"
	"text/template"
)

type chat struct {
	Messages []*message `json:"messages"`
	Tools    []tool     `json:"tools"`
	Think    *bool      `json:"think"`
}

type message struct {
	Role       string     `json:"role"`
	Content    string     `json:"content"`
	Thinking   string     `json:"thinking"`
	Images     [][]byte   `json:"images"`
	ToolCalls  []toolCall `json:"tool_calls"`
	ToolName   string     `json:"tool_name"`
	ToolCallID string     `json:"tool_call_id"`
}

type toolCall struct {
	ID       string
	Function struct {
		Index     int
		Name      string
		Arguments arguments
	}
}

type arguments map[string]any

type tool struct {
	Type     string `json:"type"`
	Items    any    `json:"items,omitempty"`
	Function struct {
		Name        string     `json:"name"`
		Description string     `json:"description"`
		Parameters  parameters `json:"parameters"`
	} `json:"function"`
}

type parameters struct {
	Type       string     `json:"type"`
	Defs       any        `json:"$defs,omitempty"`
	Items      any        `json:"items,omitempty"`
	Required   []string   `json:"required,omitempty"`
	Properties properties `json:"properties"`
}

type properties map[string]property

type property struct {
	AnyOf       []property `json:"anyOf,omitempty"`
	Type        kinds      `json:"type,omitempty"`
	Items       any        `json:"items,omitempty"`
	Description string     `json:"description,omitempty"`
	Enum        []any      `json:"enum,omitempty"`
	Properties  properties `json:"properties,omitempty"`
	Required    []string   `json:"required,omitempty"`
}

type kinds []string

func (k *kinds) UnmarshalJSON(data []byte) error {
	var one string
	if json.Unmarshal(data, &one) == nil {
		*k = kinds{one}
		return nil
	}
	return json.Unmarshal(data, (*[]string)(k))
}

func (k kinds) MarshalJSON() ([]byte, error) {
	if len(k) == 1 {
		return json.Marshal(k[0])
	}
	return json.Marshal([]string(k))
}

func (k kinds) String() string {
	if len(k) < 2 {
		return strings.Join(k, "")
	}
	return "[" + strings.Join(k, " ") + "]"
}

func (t tool) String() string       { return toJSON(t) }
func (a arguments) String() string  { return toJSON(a) }
func (p properties) String() string { return toJSON(p) }

type toolList []tool

func (t toolList) String() string { return toJSON(t) }

func toJSON(value any) string {
	text, _ := json.Marshal(value)
	return string(text)
}

type job struct {
	Template string
	Chats    []chat
}

func render(parsed *template.Template, request chat) string {
	var systems []string
	var turns []*message
	for _, next := range request.Messages {
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
		"System": strings.Join(systems, "\n\n"), "Messages": turns, "Tools": toolList(request.Tools), "Response": "",
		"Think": request.Think != nil && *request.Think, "ThinkLevel": "", "IsThinkSet": request.Think != nil,
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
	functions := template.FuncMap{"json": toJSON}
	texts := make([][]string, len(jobs))
	for i, j := range jobs {
		parsed, err := template.New("").Option("missingkey=zero").Funcs(functions).Parse(j.Template)
		if err != nil {
			log.Fatal(err)
		}
		for _, request := range j.Chats {
			texts[i] = append(texts[i], render(parsed, request))
		}
	}
	if err := json.NewEncoder(os.Stdout).Encode(texts); err != nil {
		log.Fatal(err)
	}
}
