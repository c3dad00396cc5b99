// A page opened from a file may not start a worker. The search then runs in a hidden frame.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      this.frame = document.createElement("iframe")
      this.frame.hidden = true
      this.ready = new Promise(done => this.frame.addEventListener("load", done))
      this.frame.srcdoc =
        `<script>postMessage = data => parent.postMessage(data, "*")<\/script><script src="${url}"><\/script>`
      document.body.append(this.frame)
      addEventListener("message", ({ source, data }) => {
        if (source === this.frame.contentWindow)
          this.dispatchEvent(new MessageEvent("message", { data }))
      })
    }
    postMessage(data) {
      this.ready.then(() => this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data })))
    }
    terminate() {
      this.frame.remove()
    }
  }
}
