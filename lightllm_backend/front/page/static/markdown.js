// SPDX-License-Identifier: Apache-2.0
// The Markdown that models write, as DOM nodes: no HTML is ever parsed, so a model's answer cannot become markup.
// Code blocks, headings, lists, quotes, rules; inline code, bold and italics. Everything else stays text.

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([\w+#.-]*)/;
const HEADING = /^(#{1,6})\s+(.*?)\s*#*$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const QUOTE = /^ {0,3}> ?/;
const RULE = /^ {0,3}([-*_])(?:\s*\1){2,}\s*$/;
const INLINE = /(`+)(.+?)\1|\*\*(?=\S)(.+?)\*\*|__(?=\S)(.+?)__(?!\w)|\*(?=\S)([^*]+?)\*|(?<!\w)_(?=\S)([^_]+?)_(?!\w)/s;
const MAX_DEPTH = 8;
const MAX_INLINE = 4000; // characters; a longer paragraph is shown as it is, since matching may take the square of this

const sources = new WeakMap(); // the text from which a block was made

// Shows `text` in `parent`. A block whose text is as before stays, so a selection in it outlives further tokens.
export function render(parent, text) {
  const blocks = split(text.split(/\r?\n/));
  blocks.forEach((block, index) => {
    const present = parent.children[index];
    const source = block.lines.join("\n");
    if (present && sources.get(present) === source) return;
    const made = build(block, 0);
    sources.set(made, source);
    if (present) present.replaceWith(made);
    else parent.append(made);
  });
  while (parent.children.length > blocks.length) parent.lastChild.remove();
}

// Groups lines into blocks of one kind. An open fence reaches to the end, as while an answer streams.
function split(lines) {
  const blocks = [];
  for (let index = 0; index < lines.length; ) {
    const start = index;
    const kind = kindOf(lines[index]);
    index += 1;
    if (kind === "code") {
      const [, fence] = lines[start].match(FENCE);
      while (index < lines.length && !closes(lines[index], fence)) index += 1;
      index += 1;
    } else if (kind === "list") {
      index = endOfList(lines, index);
    } else if (kind === "quote" || kind === "text") {
      while (index < lines.length && kindOf(lines[index]) === kind) index += 1;
    }
    if (kind !== "blank") blocks.push({ kind, lines: lines.slice(start, index) });
  }
  return blocks;
}

function kindOf(line) {
  if (!line.trim()) return "blank";
  if (FENCE.test(line)) return "code";
  if (HEADING.test(line)) return "heading";
  if (RULE.test(line)) return "rule";
  if (QUOTE.test(line)) return "quote";
  return ITEM.test(line) ? "list" : "text";
}

function closes(line, fence) {
  const text = line.trim();
  return text.length >= fence.length && text === fence[0].repeat(text.length);
}

// Items, lines that belong to an item, and blank lines before more of either.
function endOfList(lines, index) {
  for (let next = index; next < lines.length; next += 1) {
    const line = lines[next];
    if (!line.trim()) continue;
    const isPart = (ITEM.test(line) && !RULE.test(line)) || /^\s{2,}/.test(line);
    if (!isPart && !(next === index && kindOf(line) === "text")) break;
    index = next + 1;
  }
  return index;
}

function build({ kind, lines }, depth) {
  if (kind === "code") return codeBlock(lines);
  if (kind === "rule") return document.createElement("hr");
  if (kind === "list") return list(lines, depth);
  if (kind === "heading") {
    const [, marks, text] = lines[0].match(HEADING);
    return withInline(`h${Math.min(6, marks.length + 3)}`, text);
  }
  if (kind === "quote") {
    const quote = document.createElement("blockquote");
    quote.append(...nested(lines.map((line) => line.replace(QUOTE, "")), depth));
    return quote;
  }
  return withInline("p", lines.join("\n"));
}

function nested(lines, depth) {
  if (depth >= MAX_DEPTH) return [document.createTextNode(lines.join("\n"))];
  return split(lines).map((block) => build(block, depth + 1));
}

function codeBlock(lines) {
  const [, fence, language] = lines[0].match(FENCE);
  const end = lines.length > 1 && closes(lines.at(-1), fence) ? -1 : undefined;
  const block = document.createElement("pre");
  const code = block.appendChild(document.createElement("code"));
  code.textContent = lines.slice(1, end).join("\n");
  block.tabIndex = 0; // long lines scroll, also by keyboard
  block.setAttribute("role", "group");
  block.setAttribute("aria-label", language ? `${language} code` : "code");
  if (language) block.dataset.language = language;
  return block;
}

function list(lines, depth) {
  const [, indent, mark] = lines[0].match(ITEM);
  const isOrdered = /\d/.test(mark);
  const made = document.createElement(isOrdered ? "ol" : "ul");
  if (isOrdered) made.start = Number.parseInt(mark, 10);
  const items = [];
  for (const line of lines) {
    const item = line.match(ITEM);
    if (item && (item[1].length <= indent.length || !items.length)) items.push([item[3]]);
    else items.at(-1).push(line.replace(/^(\s{2,4}|\t)/, ""));
  }
  for (const [first, ...rest] of items) {
    const entry = made.appendChild(withInline("li", first));
    if (rest.some((line) => line.trim())) entry.append(...nested(rest, depth));
  }
  return made;
}

function withInline(name, text) {
  const made = document.createElement(name);
  made.append(...inline(text, 0));
  return made;
}

function* inline(text, depth) {
  while (text) {
    const found = depth < MAX_DEPTH && text.length <= MAX_INLINE && text.match(INLINE);
    if (!found) {
      yield document.createTextNode(text);
      return;
    }
    if (found.index) yield document.createTextNode(text.slice(0, found.index));
    const [whole, ticks, code, strong, strongToo, emphasis, emphasisToo] = found;
    const made = document.createElement(ticks ? "code" : (strong ?? strongToo) ? "strong" : "em");
    if (ticks) made.textContent = code.trim() || code;
    else made.append(...inline(strong ?? strongToo ?? emphasis ?? emphasisToo, depth + 1));
    yield made;
    text = text.slice(found.index + whole.length);
  }
}
